//! The command line of a reference worker: our own program, told every setting that is not the default.

use serde::Serialize;
use serde_json::Value;

use crate::config::{Config, KvConfig, ReferenceConfig, Role, TelemetryConfig, WeightsConfig};

/// Where one reference worker listens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seat<'a> {
    pub role: Role,
    pub host: &'a str,
    pub kv_host: &'a str,
    pub port: u16,
    pub kv_port: u16,
}

/// `pdlink engine …`. The secret is not in it: its file is named by the environment.
pub(super) fn command(pdlink: &str, config: &Config, seat: &Seat<'_>) -> Vec<String> {
    let text = |text: &str| text.to_owned();
    let mut command = vec![text(pdlink), text("engine")];
    let settings = [
        ("--role", seat.role.name().to_owned()),
        ("--host", seat.host.to_owned()),
        ("--port", seat.port.to_string()),
        ("--kv-port", seat.kv_port.to_string()),
        ("--model", config.model_name().to_owned()),
        ("--tp", config.tp(seat.role).to_string()),
    ];
    command.extend(settings.into_iter().flat_map(|(name, value)| [text(name), value]));
    if seat.kv_host != seat.host {
        command.extend([text("--kv-host"), seat.kv_host.to_owned()]);
    }
    command.extend(overrides("inference.reference", &config.inference.reference, &ReferenceConfig::default()));
    command.extend(overrides("kv", &config.kv, &KvConfig::default()));
    command.extend(overrides("weights", &config.weights, &WeightsConfig::default()));
    command.extend(overrides("telemetry", &config.telemetry, &TelemetryConfig::default()));
    if let Some(max_model_len) = config.inference.model.max_model_len {
        command.extend([text("--inference.model.max_model_len"), max_model_len.to_string()]);
    }
    if let Some(enabled) = config.inference.enable_prefix_caching {
        command.extend([text("--inference.enable_prefix_caching"), enabled.to_string()]);
    }
    command.extend([text("--pd_disagg.kv_send_type"), text(config.pd_disagg.send_type().name())]);
    command
}

/// `--section.key value` for each key of a section that differs from its default.
fn overrides<T: Serialize>(section: &str, given: &T, default: &T) -> Vec<String> {
    let (Ok(Value::Object(given)), Ok(default)) = (serde_json::to_value(given), serde_json::to_value(default)) else {
        return Vec::new();
    };
    let differs = |name: &str, value: &Value| !value.is_null() && default.get(name) != Some(value);
    let said = |(name, value): (String, Value)| match &value {
        Value::Object(_) => overrides(&format!("{section}.{name}"), &value, default.get(&name).unwrap_or(&Value::Null)),
        _ => vec![format!("--{section}.{name}"), plain(&value)],
    };
    given.into_iter().filter(|(name, value)| differs(name, value)).flat_map(said).collect()
}

/// A value as the command line takes it: text bare, the rest as JSON, which TOML reads alike.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{NixlConfig, Path};

    #[test]
    fn only_what_differs_from_the_default_is_said() {
        let kv = KvConfig { paths: Some(vec![Path::Tcp]), lease_ms: 5_000, ..KvConfig::default() };
        assert_eq!(overrides("kv", &kv, &KvConfig::default()), ["--kv.paths", r#"["tcp"]"#, "--kv.lease_ms", "5000"]);
        assert!(overrides("kv", &KvConfig::default(), &KvConfig::default()).is_empty());
        let parameters = [("num_workers".to_owned(), "2".to_owned())].into();
        let nixl = NixlConfig { library: Some("/opt/libnixl_capi.so".into()), parameters, ..NixlConfig::default() };
        let kv = KvConfig { nixl, ..KvConfig::default() };
        assert_eq!(
            overrides("kv", &kv, &KvConfig::default()),
            ["--kv.nixl.library", "/opt/libnixl_capi.so", "--kv.nixl.parameters.num_workers", "2"]
        );
    }
}
