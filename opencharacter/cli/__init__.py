"""The commands of `opencharacter`: they parse options, call the API, and print."""
