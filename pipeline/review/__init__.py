"""Runs that go over their data in phases: schedule, losses of each sequence, selection, profile."""
