"""Where may something be done? One family of sites a file: its dataclass, its matcher, its refusals."""
