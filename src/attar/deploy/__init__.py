"""The last mile: the stripped student as a file that runs on the board, proved, quantised and measured."""
