"""From files to batches: records, tokens, sampling, pairing, collation."""
