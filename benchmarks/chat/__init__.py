"""Parts of `bench_chat_student`: conversations, and what other programs make of the student."""
