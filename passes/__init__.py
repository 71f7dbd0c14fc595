"""The compiler passes, one per file, imported as `autoshard.passes`."""
