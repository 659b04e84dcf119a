"""Published recommendation data sets turned into HSFT's two files, a module a format."""
