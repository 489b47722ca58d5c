"""Model families, one file each: what every engine must know of them (`ep_core.family`)."""
