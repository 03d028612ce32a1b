"""AOTInductor: a package of compiled code a phase."""
