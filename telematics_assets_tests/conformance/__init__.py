"""One set of cases for every engine: files in; the logical table, the file states and the reports out."""
