//! The paths and their answers.

use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use axum::{Router, http};
use serde::Deserialize;

use super::AdminState;
use crate::metrics;
use crate::ping::{Probes, ping};

/// More would only keep the operator waiting.
const MAX_PROBES: u32 = 100;

/// What any user of the host may read.
pub(super) fn public(state: AdminState) -> Router {
    reading().with_state(state)
}

/// What only the socket's owner may ask for: a ping sends packets.
pub(super) fn operator(state: AdminState) -> Router {
    reading().route("/ping", post(ping_peers)).with_state(state)
}

fn reading() -> Router<AdminState> {
    Router::new()
        .route("/healthz", get(async || "weftd is running\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(exposition))
        .route("/debug/state", get(async |State(state): State<AdminState>| Json((state.status)())))
        .fallback(async |uri: http::Uri| {
            let known = "/metrics, /healthz, /readyz, /debug/state; /ping over the admin socket only";
            (StatusCode::NOT_FOUND, format!("{} is not here; there are {known}\n", uri.path()))
        })
}

async fn readyz(State(state): State<AdminState>) -> (StatusCode, String) {
    let status = (state.status)();
    if status.ready {
        let mut text = "weftd is ready\n".to_owned();
        for notice in status.notices() {
            text.push_str(&format!("notice: {notice}\n"));
        }
        return (StatusCode::OK, text);
    }
    let mut text = "weftd is not ready yet\n".to_owned();
    for awaited in &status.waiting_for {
        text.push_str(&format!("waiting for {awaited}\n"));
    }
    (StatusCode::SERVICE_UNAVAILABLE, text)
}

async fn exposition(State(state): State<AdminState>) -> Response {
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], state.metrics.render()).into_response()
}

#[derive(Deserialize)]
struct PingQuery {
    peer: String,
    count: Option<u32>,
}

async fn ping_peers(State(state): State<AdminState>, Query(query): Query<PingQuery>) -> Response {
    let mut probes = Probes::default();
    if let Some(count) = query.count {
        if !(1..=MAX_PROBES).contains(&count) {
            let text = format!("count = {count}: expected 1 to {MAX_PROBES}\n");
            return (StatusCode::BAD_REQUEST, text).into_response();
        }
        probes.count = count;
    }
    match ping(&(state.status)(), &query.peer, probes).await {
        Ok(reports) => Json(reports).into_response(),
        Err(error) => (StatusCode::NOT_FOUND, format!("{error}\n")).into_response(),
    }
}
