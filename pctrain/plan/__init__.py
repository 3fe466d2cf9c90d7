"""`pctrain plan`: what a config needs of memory, time and wires on so many GPUs, and which layouts fit. Arithmetic alone, no torch."""
