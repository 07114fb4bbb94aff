//! Adapters: names under which the model answers differently, as a digest of their files says.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{PoisonError, RwLock};

use axum::Json;
use axum::extract::{Request, State as Shared};
use serde::Deserialize;
use serde_json::{Value, json};

use super::State;
use super::body::{fields, read_object};
use crate::openai::ApiError;
use crate::weights::digest_of_folder;

/// Most adapters at once.
const ADAPTERS_MAX: usize = 1024;

/// What clients may name beside the model itself.
#[derive(Debug, Default)]
pub(in crate::engine) struct Adapters(RwLock<HashMap<String, [u8; 16]>>);

impl Adapters {
    pub(super) fn of(&self, name: &str) -> Option<[u8; 16]> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(name).copied()
    }

    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.0.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect();
        names.sort();
        names
    }
}

#[derive(Debug, Deserialize)]
struct LoadFields {
    lora_name: String,
    lora_path: PathBuf,
}

/// `POST /load_lora_adapter {"lora_name", "lora_path"}`: a name that is there already gets the new files.
pub(super) async fn load(Shared(state): Shared<State>, request: Request) -> Result<Json<Value>, ApiError> {
    let own: LoadFields = fields(&read_object(request).await?)?;
    if own.lora_name == state.model {
        return Err(ApiError::bad_param("lora_name", format!("`{}` is the model itself", own.lora_name)));
    }
    let path = own.lora_path.clone();
    let digest = tokio::task::spawn_blocking(move || digest_of_folder(&path)).await;
    let digest = digest.map_err(|error| ApiError::internal(format!("the adapter was not read: {error}")))?;
    let digest = digest.map_err(|error| ApiError::bad_param("lora_path", error.to_string()))?;
    let mut adapters = state.adapters.0.write().unwrap_or_else(PoisonError::into_inner);
    if adapters.len() >= ADAPTERS_MAX && !adapters.contains_key(&own.lora_name) {
        return Err(ApiError::bad_param("lora_name", format!("{ADAPTERS_MAX} adapters are loaded; unload one")));
    }
    adapters.insert(own.lora_name, digest.0);
    Ok(Json(json!({"status": "ok"})))
}

#[derive(Debug, Deserialize)]
struct UnloadFields {
    lora_name: String,
}

/// `POST /unload_lora_adapter {"lora_name"}`
pub(super) async fn unload(Shared(state): Shared<State>, request: Request) -> Result<Json<Value>, ApiError> {
    let own: UnloadFields = fields(&read_object(request).await?)?;
    let gone = state.adapters.0.write().unwrap_or_else(PoisonError::into_inner).remove(&own.lora_name);
    match gone {
        Some(_) => Ok(Json(json!({"status": "ok"}))),
        None => Err(ApiError::not_found(format!("there is no adapter `{}`", own.lora_name))),
    }
}
