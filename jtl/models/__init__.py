"""Model families, one file each: configuration, modules, key rules, depth groups."""
