"""Reports of every command, and their forms: tables, Markdown, JUnit, HTML."""
