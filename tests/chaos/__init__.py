"""Real jobs, broken on purpose at random: ``make chaos``; docs/chaos.md says what is counted."""
