"""Runs programs that nobody has read: time, memory, files, processes and network are limited."""
