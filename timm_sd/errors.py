"""The one exception for what a user can put right."""


class UserError(Exception):
    """Its message is a single line that names the cause and the way out; a command line prints it and fails."""
