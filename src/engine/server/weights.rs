//! New weights for this worker alone, as PRIME-RL's servers take them: from a folder, or back to what it was started with.
//!
//! A worker behind our proxy is updated by the proxy, together with all others; these routes are for one that stands alone.

use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State as Shared};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::State;
use super::body::{fields, read_object, read_object_or_nothing};
use crate::config::WeightsConfig;
use crate::control::{WeightSource, WeightsOffer, WeightsPhase, WeightsRequest, WeightsStatus};
use crate::openai::ApiError;
use crate::weights::WeightsHandle;

/// How often the weights runtime is asked how far it is.
const POLL: Duration = Duration::from_millis(2);

#[derive(Debug, Deserialize)]
struct UpdateFields {
    weight_dir: String,
}

/// `POST /update_weights {"weight_dir"}`
pub(super) async fn update_weights(Shared(state): Shared<State>, request: Request) -> Result<Json<Value>, ApiError> {
    let own: UpdateFields = fields(&read_object(request).await?)?;
    update(&state, WeightSource::Folder(own.weight_dir)).await
}

/// `POST /reload_weights`
pub(super) async fn reload_weights(Shared(state): Shared<State>, request: Request) -> Result<Json<Value>, ApiError> {
    read_object_or_nothing(request).await?;
    update(&state, WeightSource::Base).await
}

/// `POST /init_broadcaster`: weights come by folder here, so there is nobody to meet.
pub(super) async fn init_broadcaster(request: Request) -> Result<Json<Value>, ApiError> {
    read_object_or_nothing(request).await?;
    Ok(Json(json!({"status": "ok"})))
}

async fn update(state: &State, source: WeightSource) -> Result<Json<Value>, ApiError> {
    let update = Update { weights: &state.weights_runtime, config: &state.weights_config, id: rand::random() };
    let status = update.run(source).await.map_err(|why| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, why))?;
    Ok(Json(json!({"status": "ok", "weight_version": status.version})))
}

/// One update of this worker alone.
struct Update<'a> {
    weights: &'a WeightsHandle,
    config: &'a WeightsConfig,
    id: u64,
}

impl Update<'_> {
    async fn run(&self, source: WeightSource) -> Result<WeightsStatus, String> {
        let update = self.id;
        let now = self.weights.ask(WeightsRequest::Status).await?;
        let ms = |seconds: f64| Duration::try_from_secs_f64(seconds).map_or(u64::MAX, millis);
        let offer = WeightsOffer {
            update,
            version: now.version + 1,
            source,
            receivers: 1,
            receiver: 0,
            stage_ms: ms(self.config.stage_timeout_s),
            hold_ms: ms(self.config.hold_timeout_s),
        };
        self.weights.ask(WeightsRequest::Offer(offer)).await?;
        self.until(WeightsPhase::Staged, self.config.stage_timeout_s).await?;
        self.weights.ask(WeightsRequest::Pause { update, in_flight: self.config.in_flight }).await?;
        self.until(WeightsPhase::Paused, self.config.pause_timeout_s).await?;
        self.weights.ask(WeightsRequest::Commit { update }).await?;
        self.until(WeightsPhase::Committed, self.config.commit_timeout_s).await?;
        self.weights.ask(WeightsRequest::Resume { update }).await
    }

    /// Waits until the update has come to `phase`. What comes to nothing is given up.
    async fn until(&self, phase: WeightsPhase, within_s: f64) -> Result<(), String> {
        let deadline = Instant::now() + Duration::try_from_secs_f64(within_s).unwrap_or(Duration::MAX / 2);
        loop {
            let status = self.weights.ask(WeightsRequest::Status).await?;
            if let Some(failure) = status.failure.filter(|failure| failure.update == self.id) {
                return Err(format!("the update failed while {}: {}", failure.phase.name(), failure.why));
            }
            if status.phase == phase {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let why = format!("it was not {} within {within_s} s", phase.name());
                let _ = self.weights.ask(WeightsRequest::Abort { update: self.id, why: why.clone() }).await;
                return Err(why);
            }
            sleep(POLL).await;
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
