"""The commands: one file per verb, each reads options, calls the library, prints."""
