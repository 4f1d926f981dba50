"""Data and configuration shared by every process. Imports no torch."""
