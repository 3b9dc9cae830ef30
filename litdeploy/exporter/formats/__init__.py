"""One file for each format: how it is built, checked and served. The table is `litdeploy.config.formats.FORMATS`."""
