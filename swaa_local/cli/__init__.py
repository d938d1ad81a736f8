"""The command line: it parses, calls and prints. Imports everything; nothing imports it but `__main__`."""
