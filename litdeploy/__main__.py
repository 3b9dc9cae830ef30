"""`python -m litdeploy`, the form that launchers of several processes take."""

from litdeploy.cli import main

main()
