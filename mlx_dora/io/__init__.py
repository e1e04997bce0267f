"""Files and arrays: strict headers, streaming reads, writes that cannot tear."""
