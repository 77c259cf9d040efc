"""Settings: the schema, the strict merge, and the checks that need only numbers."""
