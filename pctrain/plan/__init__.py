"""`pctrain plan`: what a config needs in memory, time and bandwidth, and which layouts fit. Needs no torch."""
