"""Data: records, readers, checks, rendering to weighted tokens, the token store, batches. Import from the modules by name."""
