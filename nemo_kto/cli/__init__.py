"""The ``nemo-kto`` command line: thin verbs over the floors below."""
