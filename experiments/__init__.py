"""One script per analysis whose figures the pages report. Nothing imports from here."""
