// swkvm
