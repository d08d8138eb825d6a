"""Models: loading, the policy module over forests, methods, packed attention, fast paths, the plan. Import from the modules by name."""
