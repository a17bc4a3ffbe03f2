"""Methods side by side: what their runs came to, how sure that is, and reports of it."""
