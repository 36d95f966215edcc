"""Making the bundled generator `heads` from ICT-FaceKit's morphable head."""
