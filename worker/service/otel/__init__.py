"""OpenTelemetry, of the extra `otel`: imported only where `otel.enabled` asks for it."""
