"""Workers that train one student together: `ddp` copies it to each, `fsdp` shares it among them."""
