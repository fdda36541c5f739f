"""Examines the installation and the machine; works where torch does not import."""
