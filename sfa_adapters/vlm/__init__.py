"""What the library knows about whole vision-language models: one record each, and how their parts are found."""
