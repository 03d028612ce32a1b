"""With what does it run? One operator a file: schema, fake, reference, CPU and Triton."""
