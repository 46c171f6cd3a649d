"""The HTTP floor: uploads, jobs, events, downloads. Thin: every decision is made one floor down."""
