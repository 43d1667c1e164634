"""The command line: words, progress, exit codes. One command a file; the only room that prints."""
