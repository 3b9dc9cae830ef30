"""The report for people and programs: page, charts, tables, files."""
