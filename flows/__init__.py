"""One flow a file: order, parameters, decisions, states."""
