"""Reports: read run folders and curve files, answer questions about them, draw charts, and write pages and tables."""
