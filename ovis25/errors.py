"""What every error that a user can mend has in common."""


class UserError(Exception):
    """The message is for the user: what was wrong, where, and the cure. The command line shows it without a stack.

    `exit_code` is what a command ends with then.
    """

    exit_code = 2
