"""What is made (`Recipe`) and where it runs (`Placement`)."""
