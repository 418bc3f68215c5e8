"""Programs that answer: on the command line (`cli`, `chat`) and over the network."""
