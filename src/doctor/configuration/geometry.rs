//! Whether KV of the prefill role can be used by the decode role, from the model's own configuration and the arguments of both:
//! what two workers find when they meet, minutes later.

use serde_json::Value;

use super::super::check::Answer;
use super::super::setting::Setting;
use super::{model_files, why_none};
use crate::config::{Config, EngineKind, Role};
use crate::kv::{Geometry, GroupGeometry, GroupKind};

/// Tokens in a block where nothing is said: vLLM's on a GPU, and of its build for the CPU.
const BLOCK_SIZE: u32 = 16;
const BLOCK_SIZE_ON_CPU: u32 = 128;

pub(super) fn check(setting: &Setting) -> Answer {
    let Some(config) = setting.config() else { return Answer::skipped(why_none(setting)) };
    if !setting.has_link() {
        return Answer::skipped("no worker moves KV by a path of ours");
    }
    let geometries = match config.inference.engine {
        EngineKind::Reference => Ok((of_reference(config, Role::Prefill), of_reference(config, Role::Decode))),
        EngineKind::Vllm => of_model(setting, config),
    };
    let (prefill, decode) = match geometries {
        Ok(both) => both,
        Err(why) => return Answer::skipped(why),
    };
    judge(&prefill, &decode)
}

fn judge(prefill: &Geometry, decode: &Geometry) -> Answer {
    let in_words = |geometry: &Geometry| {
        let group = &geometry.groups[0];
        format!("{} ranks, blocks of {} tokens, {}", geometry.tp_size, group.block_size, group.dtype)
    };
    let group = &prefill.groups[0];
    let seen = format!(
        "{}: {} layers of {} KV heads of {}, {} B of KV a token; prefill {}; decode {}",
        prefill.model,
        group.layers,
        group.kv_heads,
        group.head_size,
        prefill.token_bytes(),
        in_words(prefill),
        in_words(decode)
    );
    let answer = match prefill.check_feeds(decode) {
        Ok(()) => Answer::ok(seen),
        Err(error) => Answer::fail(
            format!("decode cannot use prefill's KV: {error} ({seen})"),
            "make the roles agree: [inference.vllm] against [inference.vllm.prefill] and .decode, pd_disagg.prefill_tp and decode_tp",
        ),
    };
    answer.with("token_bytes", prefill.token_bytes())
}

fn of_reference(config: &Config, role: Role) -> Geometry {
    let reference = &config.inference.reference;
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let group = GroupGeometry {
        kind: GroupKind::Heads,
        layers: number(reference.layers),
        kv_heads: number(reference.kv_heads),
        head_size: number(reference.head_size),
        element_bytes: number(reference.dtype_bytes),
        dtype: format!("{} bytes", reference.dtype_bytes),
        block_size: number(reference.block_size),
        window: None,
        opaque_planes: None,
    };
    Geometry { model: config.model_name().to_owned(), tp_size: config.tp(role), groups: vec![group] }
}

fn of_model(setting: &Setting, config: &Config) -> Result<(Geometry, Geometry), String> {
    let name = config.model_name();
    let file = model_files::config_file(name)
        .ok_or_else(|| format!("the config.json of {name} is not on this machine yet; vLLM will fetch it"))?;
    let text = std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
    let model: Value = serde_json::from_str(&text).map_err(|error| format!("{}: {error}", file.display()))?;
    let of = |role| of_role(config, role, &model, setting.on_cpu());
    let both = of(Role::Prefill).zip(of(Role::Decode));
    both.ok_or_else(|| format!("{} has KV of a kind that only vLLM can tell", file.display()))
}

/// As vLLM would make it. `None`: not every layer has the same kind of attention.
fn of_role(config: &Config, role: Role, model: &Value, on_cpu: bool) -> Option<Geometry> {
    let text = model.get("text_config").unwrap_or(model);
    let number = |name: &str| text.get(name).and_then(Value::as_u64).and_then(|value| u32::try_from(value).ok());
    if ["layer_types", "ssm_cfg", "mamba_d_state", "linear_num_key_heads"]
        .iter()
        .any(|name| text.get(*name).is_some_and(mixed))
    {
        return None;
    }
    let arg = |name: &str| config.inference.vllm.arg(role, name);
    let said = |name: &str| arg(name).and_then(|value| value.as_str().map(str::to_owned)).filter(|text| text != "auto");
    let own = text.get("torch_dtype").or_else(|| text.get("dtype")).and_then(Value::as_str).unwrap_or("bfloat16");
    let configured = Some(config.inference.model.dtype.name().to_owned()).filter(|name| name != "auto");
    // What models are published in and vLLM computes in by itself: 32 bits are cut to 16.
    let own = if own == "float32" { "float16" } else { own };
    let dtype = said("kv_cache_dtype").or_else(|| said("dtype")).or(configured).unwrap_or_else(|| own.to_owned());
    let heads = number("num_attention_heads")?;
    let latent = number("kv_lora_rank").zip(number("qk_rope_head_dim"));
    let head_size = match latent {
        Some((rank, rope)) => rank + rope,
        None => number("head_dim").or_else(|| Some(number("hidden_size")? / heads.max(1)))?,
    };
    let usual = if on_cpu { BLOCK_SIZE_ON_CPU } else { BLOCK_SIZE };
    let block_size = arg("block_size").and_then(|value| value.as_u64()).and_then(|value| u32::try_from(value).ok());
    let group = GroupGeometry {
        kind: if latent.is_some() { GroupKind::Latent } else { GroupKind::Heads },
        layers: number("num_hidden_layers")?,
        kv_heads: if latent.is_some() { 1 } else { number("num_key_value_heads").unwrap_or(heads) },
        head_size,
        element_bytes: element_bytes(&dtype),
        dtype,
        block_size: block_size.unwrap_or(usual),
        window: None,
        opaque_planes: on_cpu.then(|| "this processor's".to_owned()),
    };
    Some(Geometry { model: config.model_name().to_owned(), tp_size: config.tp(role), groups: vec![group] })
}

/// A list of one kind of layer is as good as none.
fn mixed(value: &Value) -> bool {
    value.as_array().is_none_or(|kinds| kinds.iter().any(|kind| kind != "full_attention"))
}

fn element_bytes(dtype: &str) -> u32 {
    match dtype {
        "float32" | "float" => 4,
        name if name.starts_with("fp8") || name == "int8" => 1,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::check::Verdict;
    use super::*;

    fn geometry(config: &Config, role: Role, on_cpu: bool) -> Geometry {
        let model = serde_json::json!({
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "torch_dtype": "bfloat16"
        });
        of_role(config, role, &model, on_cpu).unwrap()
    }

    fn config(prefill: u64, decode: u64) -> Config {
        let mut config = Config::default();
        let args = |size: u64| [("block-size".to_owned(), serde_json::json!(size))].into_iter().collect();
        (config.inference.vllm.prefill, config.inference.vllm.decode) = (args(prefill), args(decode));
        config
    }

    #[test]
    fn what_a_model_says_of_itself_becomes_its_geometry() {
        let own = geometry(&config(16, 16), Role::Prefill, false);
        assert_eq!((own.token_bytes(), own.groups[0].block_size), (147_456, 16));
        let latent = serde_json::json!({
            "num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64
        });
        let latent = of_role(&config(64, 64), Role::Decode, &latent, false).unwrap();
        assert_eq!((latent.groups[0].kind, latent.token_bytes()), (GroupKind::Latent, 61 * 576 * 2));
        let hybrid = serde_json::json!({ "num_hidden_layers": 4, "num_attention_heads": 4, "layer_types": ["linear_attention"] });
        assert!(of_role(&config(16, 16), Role::Decode, &hybrid, false).is_none());
    }

    #[test]
    fn block_sizes_that_do_not_fit_are_named() {
        let judged = |prefill, decode, on_cpu| {
            let config = config(prefill, decode);
            judge(&geometry(&config, Role::Prefill, on_cpu), &geometry(&config, Role::Decode, on_cpu))
        };
        assert_eq!(judged(16, 32, false).result, Verdict::Ok);
        let uneven = judged(16, 24, false);
        assert_eq!(uneven.result, Verdict::Fail);
        assert!(uneven.seen.contains("the block size is 16 at prefill and 24 at decode"), "{}", uneven.seen);
        let packed = judged(16, 32, true);
        assert_eq!(packed.result, Verdict::Fail);
        assert!(packed.seen.contains("packed planes cannot be split"), "{}", packed.seen);
    }
}
