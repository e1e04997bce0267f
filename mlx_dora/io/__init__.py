"""Files and arrays: strict headers, streaming reads and atomic writes."""
