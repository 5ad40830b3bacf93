"""Reads finished or running studies: what they found, what it cost, tables and pages."""
