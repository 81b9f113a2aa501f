"""A private Ray on this machine for `jenga serve`: started, watched and stopped by its own record."""
