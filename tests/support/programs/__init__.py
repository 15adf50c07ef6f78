"""Programs that tests run in processes of their own; each prints what its test asserts."""
