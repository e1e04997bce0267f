"""The commands. Each verb's file reads options, calls the library and prints."""
